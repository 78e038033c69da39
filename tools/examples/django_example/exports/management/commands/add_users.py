"""`manage.py add_users`: the two users that the login page tells of."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand


class Command(BaseCommand):
    help = "Add ann and ben, if they are not there yet."

    def handle(self, *args: object, **options: object) -> None:
        for name in ("ann", "ben"):
            if not User.objects.filter(username=name).exists():
                User.objects.create_user(name, password=f"{name}-secret")
