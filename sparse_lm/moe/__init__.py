"""Mixture of experts: routers, dispatchers, experts, balance."""
