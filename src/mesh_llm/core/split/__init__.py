"""How one model is split over nodes: group, election, layout."""
