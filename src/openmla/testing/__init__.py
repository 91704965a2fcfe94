"""Hostile cases and the tolerance rule, public so that third-party backends inherit them."""
