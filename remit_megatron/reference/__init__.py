"""The frozen model that scores every token."""
