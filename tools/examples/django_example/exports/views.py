"""What makes the jobs of Django's users live: `who`, the auth hook, and `start`, which reports on its work.

The browser sends statuswire what it has: Django's session cookie. statuswire asks `who`, with that cookie, whose it is.
So there is Django's own login, no token in any page, and no second list of users.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from uuid import uuid4

import httpx
from django import forms
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser
from django.contrib.auth.views import LogoutView
from django.http import FileResponse, HttpRequest, HttpResponse, HttpResponseBadRequest, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from statuswire import JobCancelled, job

# What the page does. The FastAPI example has the same one; a real project has it among its static files.
SCRIPT = Path(__file__).parents[2] / "session_page.js"
log = logging.getLogger(__name__)


class ExportForm(forms.Form):
    pages = forms.IntegerField(min_value=1, max_value=500)


def status_user(user: AbstractBaseUser | AnonymousUser) -> str:
    """What statuswire calls a user: the key, because names may change, and have characters that ids may not."""
    return f"user-{user.pk}"


@require_GET
def who(request: HttpRequest) -> HttpResponse:
    """Whose session this is. statuswire remembers the answer for `auth.hook_cache` seconds."""
    if not request.user.is_authenticated:
        return HttpResponse(status=401)
    # Connections that are live end with the session.
    ends = request.session.get_expiry_date().timestamp()
    return JsonResponse({"userId": status_user(request.user), "admin": request.user.is_superuser, "expiresAt": ends})


@require_GET
@login_required
def jobs(request: HttpRequest) -> HttpResponse:
    """The page. It knows no job: its own list comes from statuswire."""
    return render(request, "exports/jobs.html", {"statuswire": settings.PUBLIC_STATUSWIRE_URL})


@require_GET
def script(request: HttpRequest) -> FileResponse:
    """What the page does."""
    return FileResponse(SCRIPT.open("rb"), content_type="text/javascript")


@require_POST
@login_required
def start(request: HttpRequest) -> HttpResponse:
    """Start a job in the user's name, which is the session's and nothing that a form could say."""
    form = ExportForm(request.POST)
    if not form.is_valid():
        return HttpResponseBadRequest(str(form.errors))
    # A thread is the simplest worker, and dies with this process. In a queue's task `export` is the same; the jobs of
    # Celery and RQ can be shown without it, too.
    arguments = (f"export-{uuid4().hex[:8]}", status_user(request.user), form.cleaned_data["pages"])
    Thread(target=export, args=arguments, daemon=True).start()
    return redirect("jobs")


def export(job_id: str, user: str, pages: int) -> None:
    """The work. However the block is left, by its end, an exception or a cancellation, that is how the job ends."""
    # A lease: should this process be killed, those who watch see it within seconds.
    with suppress(JobCancelled), job(job_id, user=user, kind="export", ttl=10, raise_on_cancel=True) as j:
        for page in range(1, pages + 1):
            time.sleep(0.2)
            j.progress(100 * page / pages, f"Page {page} of {pages}", steps=(page, pages))
        j.complete(message="Ready to download", result={"pages": pages})


class Logout(LogoutView):
    """Ends the session, and what it has opened."""

    def post(self, request: HttpRequest, *args: object, **kwargs: object) -> HttpResponse:
        user = status_user(request.user) if request.user.is_authenticated else ""
        # In this order: a page that comes back at once must not find the session. (`user_logged_out` comes too early.)
        answer: HttpResponse = super().post(request, *args, **kwargs)
        if user:
            disconnect(user)
        return answer


def disconnect(user: str) -> None:
    """End the user's live connections, and have statuswire ask anew whose a session is.

    Pages of the user's other sessions, on another device say, load themselves again.
    """
    headers = {"Authorization": f"Bearer {settings.STATUSWIRE_TOKEN}"}
    try:
        httpx.delete(f"{settings.STATUSWIRE_URL}/api/sse/users/{user}", headers=headers, timeout=5).raise_for_status()
    except httpx.HTTPError as error:
        # Nobody is kept from logging out by it: then they end when the session would have, by `expiresAt`.
        log.warning("connections of %s stay open: %s", user, error)
