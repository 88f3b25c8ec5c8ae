"""What the pipeline runs on: local servers, images, work pools."""
