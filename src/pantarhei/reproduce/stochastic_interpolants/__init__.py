"""The claims of stochastic interpolants (Albergo et al. 2303.08797) on a CPU."""
