"""Bundles behind HTTP, in the form of the OpenAI images API. Needs the extra `accuquant[serve]`; never torch."""
