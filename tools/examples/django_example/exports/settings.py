"""A Django project as small as one with users can be. Of it, statuswire needs the last three lines."""

from __future__ import annotations

import os
from pathlib import Path

from django.core.management.utils import get_random_secret_key

BASE_DIR = Path(__file__).parents[1]
# A new one at each start only means that everybody has to log in again.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or get_random_secret_key()
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "exports.urls"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions", "exports"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DJANGO_DATABASE", BASE_DIR / "django.db"),
    }
}
USE_TZ = True
TIME_ZONE = "UTC"
# Not a line for each request.
LOGGING = {"version": 1, "disable_existing_loggers": False, "loggers": {"django.server": {"level": "WARNING"}}}
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "jobs"
LOGOUT_REDIRECT_URL = "login"
# Lax, which is Django's default, too: another port of the same host is the same site. With HTTPS, also SECURE.
SESSION_COOKIE_SAMESITE = "Lax"

# Where this server and its workers find statuswire, where browsers do, and the workers' token.
STATUSWIRE_URL = os.environ.get("STATUSWIRE_URL", "http://127.0.0.1:3000")
PUBLIC_STATUSWIRE_URL = os.environ.get("PUBLIC_STATUSWIRE_URL", STATUSWIRE_URL)
STATUSWIRE_TOKEN = os.environ.get("STATUSWIRE_TOKEN", "")
