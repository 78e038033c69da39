"""Addresses."""

from __future__ import annotations

from django.contrib.auth.views import LoginView
from django.urls import path

from . import views

urlpatterns = [
    path("", views.jobs, name="jobs"),
    path("page.js", views.script, name="page.js"),
    path("exports", views.start, name="start"),
    path("login", LoginView.as_view(template_name="exports/login.html"), name="login"),
    path("logout", views.Logout.as_view(), name="logout"),
    # The auth hook. Browsers have no use for it, so it need not be reachable from outside.
    path("statuswire/who", views.who),
]
