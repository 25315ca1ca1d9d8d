"""Values that every part of the core shares: identifiers, models, announcements, events, effects, errors."""
