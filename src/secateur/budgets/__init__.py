"""What a network costs, and steering it to a size: costs, penalties, budgets, the projection."""
