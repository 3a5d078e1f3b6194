"""Serving: engines, the model server, the OpenAI-compatible gateway, deployments and their autoscaling."""
