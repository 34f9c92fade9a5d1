import asyncio


class Till:
    """Can only be used on the loop that it was opened on, as most clients of servers."""

    @classmethod
    async def open(cls):
        till = cls()
        till.loop = asyncio.get_running_loop()
        return till

    async def take(self, amount):
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("attached to a different loop")
        return amount
