"""The page on which people inpaint images of their own: jobs, models, and the web application."""
