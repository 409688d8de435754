"""The models that `benchmarks.train` trains, and the engines that train them."""
