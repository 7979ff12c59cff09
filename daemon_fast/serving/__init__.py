"""`daemon-fast serve`: a fitted artefact behind the OpenAI protocol."""
