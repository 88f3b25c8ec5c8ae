"""Infrastructure of the pipeline: local servers, container images, deployments and work pools."""
