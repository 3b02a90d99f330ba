"""How long a network takes on the user's machine: measured layer by layer, fitted, predicted, cached."""
