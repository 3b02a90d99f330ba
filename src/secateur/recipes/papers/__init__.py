"""The papers' experiments: one small recipe object for each, runs that resume, records, and the page made of them."""
