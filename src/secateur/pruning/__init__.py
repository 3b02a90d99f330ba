"""Gates on a user's model while it trains: rules, placement, draws, estimators, and the end."""
