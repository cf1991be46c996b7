"""Data in object storage: addresses, credentials, requests. obstore is imported by the first request."""
