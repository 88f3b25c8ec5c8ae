"""The demo's models: their training data, architectures and training. The weights are in `demo/models/`."""
