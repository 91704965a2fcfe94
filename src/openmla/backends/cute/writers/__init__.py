"""Cache writers: RoPE of k_pe, quantisation and the scatter of new tokens into a paged cache."""
