//! System calls of a start with a NIC that fail one after the other.

use std::path::Path;

use super::machine::{Nic, Role, hugepages};
use crate::case::{Cases, Context};
use crate::inject::{Call, OF_EVERY_START, Target, fail_each};
use crate::l2fwd::Start;

/// The call that does the main work of a start.
const MAIN: Call = ("ioctl", "ENOMEM");
/// Calls of a start with a NIC, in addition to those of every start.
const MORE: [Call; 12] = [
    ("openat", "EMFILE"),
    ("memfd_create", "EMFILE"),
    ("ftruncate", "ENOSPC"),
    ("mmap", "ENOMEM"),
    ("munmap", "EINVAL"),
    ("madvise", "ENOMEM"),
    ("read", "EIO"),
    ("pread64", "EIO"),
    ("pwrite64", "EIO"),
    ("newfstatat", "EACCES"),
    ("eventfd2", "EMFILE"),
    ("prlimit64", "EPERM"),
];

pub(super) fn cases(cases: &mut Cases, mode: &'static str) {
    for call in [MAIN].into_iter().chain(MORE).chain(OF_EVERY_START) {
        let name = format!("each {} of a start fails once with {}, e1000e, {mode}", call.0, call.1);
        let case = cases.add(name, move |context| fails(context, mode, call)).limit(600);
        // On a busy machine each call takes a minute, so one mode stands for all.
        if call != MAIN || mode != "cdev" {
            case.in_full();
        }
    }
}

fn fails(context: &Context, mode: &str, call: Call) -> anyhow::Result<()> {
    let nic = Nic::E1000e.bdf(Role::FwdRx);
    let runtime = "/var/run/vireo/fwd";
    let target = Target {
        start: Start::new(format!("-l 1 --no-sandbox --vfio-mode {mode} -a {nic} -- -p 1 -T 0")),
        is_up: &|event| event["event"] == "forwarding",
        left: &|_| {
            let (free, all) = (hugepages("free_hugepages")?, hugepages("nr_hugepages")?);
            Ok((free != all).then(|| format!("{} hugepages were not released", all - free)))
        },
        names: &|| Path::new(runtime).exists().then(|| runtime.to_owned()),
    };
    fail_each(context, &target, call)
}
