//! Two functions of one slot and therefore of one IOMMU group, which is available to user space as a whole or
//! not at all.

use anyhow::Result;

use super::Boot;
use super::doctor::{unusable, usable};
use super::machine::{bind, rebind_on_drop};
use super::refuse::refused_as;
use super::traffic::starts_again;
use crate::case::Cases;
use crate::l2fwd::Start;

const FIRST: &str = "0000:00:10.0";
const SECOND: &str = "0000:00:10.1";
const MODES: [&str; 3] = ["container", "cdev", "compat"];

pub(super) fn cases(cases: &mut Cases, boot: Boot) {
    for mode in MODES {
        cases.add(format!("both ports of a group, {mode}"), move |context| {
            usable(context, mode, FIRST)?;
            let start =
                Start::new(format!("-l 1 --vfio-mode {mode} -a {FIRST} -a {SECOND} -- -p 3 -q 2 -T 0"));
            start.forwarding(context)?.stop()?;
            Ok(())
        });
        cases
            .add(format!("refused: a group that is not viable, {mode}"), move |context| {
                let again = rebind_on_drop(SECOND);
                bind(SECOND, "e1000")?;
                let text = format!(
                    "kernel drivers are bound to {SECOND} (e1000); run: vireo-devbind --bind vfio-pci {SECOND}"
                );
                unusable(context, mode, FIRST, (69, &text))?;
                drop(again);
                starts_again(context, boot.generator_mode())
            })
            .on_both_kernels();
    }
    for (first, second) in MODES.into_iter().flat_map(|first| MODES.map(|second| (first, second))) {
        cases
            .add(format!("refused: the group's other port is in use in {first}, {second}"), move |context| {
                let start = Start::new(format!("-l 1 --vfio-mode {first} -a {FIRST} -- -p 1 -T 0"));
                let l2fwd = start.forwarding(context)?;
                let text = format!("in use by pid {} (vireo-l2fwd)", l2fwd.process.pid());
                unusable(context, second, SECOND, (75, &text))?;
                l2fwd.stop()?;
                Ok(())
            })
            .on_both_kernels();
    }
    for (first, second) in [("cdev", "container"), ("container", "compat")] {
        cases.add(
            format!("refused: the ports of a group in {first} and {second}"),
            move |context| -> Result<()> {
                let arguments =
                    format!("-l 1 -a {FIRST},vfio-mode={first} -a {SECOND},vfio-mode={second} -- -p 3");
                let text = "open in another mode; give all its devices the same vfio-mode";
                refused_as(context, ("root", ""), &arguments, (64, text)).map(drop)
            },
        );
    }
}
