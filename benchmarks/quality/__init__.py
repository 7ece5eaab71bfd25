"""What policies cost in quality: the commands behind the documentation's results."""
