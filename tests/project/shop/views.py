from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.http import HttpResponse, StreamingHttpResponse
from rest_framework.decorators import api_view
from rest_framework.response import Response

from .till import Till


async def customers(request):
    return HttpResponse(str(await User.objects.acount()))


def pay(request):
    till = async_to_sync(Till.open)()
    return HttpResponse(str(sum(async_to_sync(till.take)(amount) for amount in (1, 2, 3))))


async def receipt(request):
    till = await Till.open()

    async def lines():
        for amount in (1, 2, 3):
            yield f"{await till.take(amount)}\n"

    return StreamingHttpResponse(lines())


@api_view(["POST"])
def api_pay(request):
    till = async_to_sync(Till.open)()
    return Response({"paid": async_to_sync(till.take)(5), "by": str(request.user)})


def broken(request):
    raise LookupError("no such thing")
