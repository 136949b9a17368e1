"""The options of a run, the checks of their values, and the choice of a device."""
