"""The whole way of a published card, at the true widths of its model, against a hub on this machine."""
