//! System calls of a start on shared-memory rings that fail one after the other.

use super::cargo::need;
use super::rings::{End, await_sockets, prefix};
use crate::case::{Cases, Context};
use crate::inject::{Call, OF_EVERY_START, Target, fail_each};
use crate::l2fwd::Start;

/// Calls that create and share resources.
const CALLS: [Call; 10] = [
    ("openat", "EMFILE"),
    ("socket", "EMFILE"),
    ("bind", "EADDRINUSE"),
    ("listen", "EADDRINUSE"),
    ("connect", "ECONNREFUSED"),
    ("memfd_create", "EMFILE"),
    ("ftruncate", "ENOSPC"),
    ("clone3", "EAGAIN"),
    ("eventfd2", "EMFILE"),
    ("sendmsg", "EPIPE"),
];
/// Calls of a start on rings, in addition to those of every start.
const MORE: [Call; 6] = [
    ("ioctl", "EINVAL"),
    ("accept4", "EMFILE"),
    ("recvmsg", "ECONNRESET"),
    ("recvfrom", "ECONNRESET"),
    ("poll", "ENOMEM"),
    ("getsockopt", "EINVAL"),
];

pub(super) fn cases(cases: &mut Cases) {
    for call in
        CALLS.into_iter().chain(MORE).chain(OF_EVERY_START.into_iter().filter(|call| !CALLS.contains(call)))
    {
        for end in [End::Vhost, End::VirtioUser] {
            let name = format!("each {} of a start on {} fails once with {}", call.0, end.name(), call.1);
            let case = cases.add(name, move |context| fails(context, end, call)).limit(600);
            if !CALLS.contains(&call) {
                case.in_full();
            }
        }
    }
}

fn fails(context: &Context, end: End, call: Call) -> anyhow::Result<()> {
    need(&["strace"])?;
    let runtime = context.path("runtime");
    std::fs::create_dir(&runtime)?;
    // All starts use the same peer, which survives their failures.
    let peer = match end {
        End::Vhost => None,
        End::VirtioUser => {
            let devices = End::Vhost.devices(&context.dir, 2, "");
            let start = format!("-l 1 {} --in-memory {devices} -- -p 3 -q 2 -T 0", prefix("inject-peer"));
            let mut command = Start::new(start).command(context);
            let peer = crate::process::Process::spawn(context, "peer", &mut command)?;
            await_sockets(&context.dir, 2)?;
            Some(peer)
        }
    };
    let devices = end.devices(&context.dir, 2, "");
    let left = |name: &str| context.path(name).exists().then(|| name.to_owned());
    let target = Target {
        start: Start::new(format!("-l 0 --no-sandbox {devices} -- -p 3 -q 2 -T 0"))
            .environment("RUNTIME_DIRECTORY", &runtime),
        // The last event before the wait for links, which never ends on vhost without a frontend.
        is_up: &|event| event["event"] == "port" && event["port"] == 1,
        left: &|_| Ok(None),
        names: &|| {
            let sockets = if peer.is_some() { None } else { left("0").or_else(|| left("1")) };
            left("runtime/vireo/fwd").or(sockets)
        },
    };
    fail_each(context, &target, call)
}
