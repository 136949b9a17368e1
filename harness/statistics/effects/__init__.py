"""Effect sizes with intervals and p-values: of one group of images, of two groups, of several seeds."""
