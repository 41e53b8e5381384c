"""How far a world may be believed: what is measured (`parts`, `variations`), what follows (`findings`), and the `page`."""
