"""Options, the definition of a run and the choice of a device."""
