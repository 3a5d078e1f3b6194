"""From a model's reference to Ray Serve applications on the right nodes, and the gateway's way to them."""
