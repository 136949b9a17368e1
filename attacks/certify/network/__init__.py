"""Reading a model as affine blocks and piecewise linear nonlinearities, and interval arithmetic for them."""
