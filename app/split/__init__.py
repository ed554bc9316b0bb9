"""The Split page: the draft of a plan, its canvas and its faders."""
