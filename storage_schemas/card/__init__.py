"""How an artifact presents itself: dataset card, Croissant metadata, contact sheet."""
