"""How Foolbox and torchattacks are called, and the ladder of radii for attacks that need one."""
