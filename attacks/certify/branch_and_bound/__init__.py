"""The exact distance of small ReLU networks: branch and bound over the activations."""
