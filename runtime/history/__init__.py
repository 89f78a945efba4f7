"""What loads on this machine were like, measured and predicted, kept in a file of the user's."""
