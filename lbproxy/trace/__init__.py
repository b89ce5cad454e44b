"""`lbproxy trace`: connections followed live through the hooks of lbproxy."""
