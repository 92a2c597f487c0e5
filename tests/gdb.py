# Lists the coroutines of a program that uses tcpserver.h, with their stacks: those that wait, also in a core file.
#   gdb -x tests/gdb.py program [core | pid], then: tsrv-coroutines [what backtrace takes, such as full or -3]
# The program needs debug information (-g). Stacks are found on x86-64 and aarch64, but not with TSRV_USE_UCONTEXT.
import re
import gdb
import gdb.unwinder

# Where a switch has left off is the caller of a frame that is made up: so no register is written, and core files do.
REGISTERS = {
    "i386:x86-64": {"rsp": "stack", "rbp": "frame", "rip": "resume"},
    "aarch64": {"sp": "stack", "x29": "frame", "pc": "resume"},
}


class FrameId:
    def __init__(self, sp, pc):
        self.sp, self.pc = sp, pc


class Unwinder(gdb.unwinder.Unwinder):
    context = innermost = None

    def __init__(self):
        super().__init__("tcpserver.h coroutines")

    def __call__(self, frame):
        if self.context is None or int(frame.read_register("sp")) != self.innermost:
            return None
        # Below all frames of the coroutine: gdb takes frames that go the other way for corrupt.
        low = self.context["stack"].cast(frame.read_register("sp").type) - 4096
        unwound = frame.create_unwind_info(FrameId(low, frame.read_register("pc")))
        for register, member in REGISTERS[frame.architecture().name()].items():
            unwound.add_saved_register(register, self.context[member].cast(frame.read_register(register).type))
        return unwound

    def backtrace(self, context, arguments):
        gdb.invalidate_cached_frames()
        self.innermost = int(gdb.newest_frame().read_register("sp"))
        self.context = context
        gdb.invalidate_cached_frames()
        try:
            text = gdb.execute("backtrace " + arguments, to_string=True)
        finally:
            self.context = None
            gdb.invalidate_cached_frames()
        # Without the frame that is made up, and without what has called the coroutine: nothing.
        return re.sub(r"(\A#0 |#\d+ +0x0+ in \?\? ).*\n([^#].*\n)*", "", text)


unwinder = Unwinder()
gdb.unwinder.register_unwinder(None, unwinder, replace=True)


def linked(head, type_name, member):
    """The objects that are linked behind head by that member."""
    object_type = gdb.lookup_type(type_name)
    offset = next(field.bitpos // 8 for field in object_type.fields() if field.name == member)
    link = head["next"]
    while link != head.address:
        yield (link.cast(gdb.lookup_type("char").pointer()) - offset).cast(object_type.pointer()).dereference()
        link = link["next"]


class Coroutines(gdb.Command):
    """List the coroutines of tcpserver.h, with their stacks. Arguments are those of backtrace."""

    def __init__(self):
        super().__init__("tsrv-coroutines", gdb.COMMAND_STACK)

    def invoke(self, arguments, from_tty):
        for loop in linked(gdb.parse_and_eval("tsrvi_process.loops.list"), "struct tsrv_loop", "link"):
            for co in linked(loop["coroutines"]["all"], "struct tsrvi_co", "link"):
                running = co.address == loop["coroutines"]["running"]
                state = "runs" if running else "waits" if co["waiting"] else "is about to run"
                print("coroutine %#x of loop %#x %s: %s" % (co.address, loop.address, state, co["function"]))
                if not running:  # else its stack is a thread's
                    print(unwinder.backtrace(co["fiber"]["context"], arguments))


Coroutines()
