"""Full attention: every query scores every key it may see."""
