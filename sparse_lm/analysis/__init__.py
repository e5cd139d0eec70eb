"""What the experts of a trained run do: what they specialise in, and what happens without them."""
