"""From a model to affine blocks and piecewise linear functions, with their values on boxes of inputs."""
