"""What a selection policy does, in words: rules, attributions, who gets what, and what would have to change."""
