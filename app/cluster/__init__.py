"""The Cluster page: nodes, their devices and their processes."""
