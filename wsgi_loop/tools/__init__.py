"""What looks at requests and loop calls: for tests, reports, panels and system checks. Serves none of them."""
