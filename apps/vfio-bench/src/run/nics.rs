//! The NICs on which modes and references are measured.

use vireo_bus_pci::{Bus, PciInfo};
use vireo_drivers::table::driver_of;
use vireo_eal::bdf::Bdf;
use vireo_eal::program::note;
use vireo_eal::{Error, ErrorKind, Result};

use super::RunArgs;
use crate::measure::{Setup, Wiring};
use crate::reference::Reference;

/// Returns the NICs that the arguments name, or those that [`wirings`] finds.
pub(super) fn setups(args: &RunArgs, bus: &Bus) -> Result<Vec<Setup>> {
    if args.ports.is_empty() {
        return Ok(wirings(&args.nics, bus, note)?.into_iter().map(Setup::Wired).collect());
    }
    let infos = args.ports.iter().map(|text| bus.find(text.parse::<Bdf>()?)).collect::<Result<Vec<_>>>()?;
    Ok(vec![Setup::new(infos)?])
}

/// Returns the references that the arguments name, each with the index of a setup on which it can be
/// measured. `say` receives a line for each setup on which it cannot.
pub(super) fn references(
    args: &RunArgs,
    setups: &[Setup],
    mut say: impl FnMut(&str),
) -> Result<Vec<(usize, Reference)>> {
    let mut found = Vec::new();
    for &reference in &args.references {
        reference.check(&args.testpmd)?;
        for (place, setup) in setups.iter().enumerate() {
            let Setup::Wired(Wiring { nic, inner: [inside, _], .. }) = setup else {
                let what = format!("cannot measure {}", reference.name());
                let why = "references need four NICs and no external generator";
                return Err(Error::new(ErrorKind::Usage, what, why).with_hint("leave out --references"));
            };
            match reference.unsupported_reason(inside) {
                Some(why) => say(&left_out(reference, nic, why)),
                None => found.push((place, reference)),
            }
        }
    }
    Ok(found)
}

pub(super) fn left_out(reference: Reference, nic: &str, why: impl std::fmt::Display) -> String {
    format!("vireo-vfio-bench: {} is left out on {nic}: {why}", reference.name())
}

/// Returns four NICs of each kind in `nics`. If `nics` is empty, returns those of every kind with exactly
/// four NICs, and `say` receives a line for each other kind.
pub(crate) fn wirings(nics: &[String], bus: &Bus, mut say: impl FnMut(&str)) -> Result<Vec<Wiring>> {
    let mut kinds: Vec<(&'static str, Vec<PciInfo>)> = Vec::new();
    for info in bus.scan()?.into_iter().filter(|info| bus.is_on_vfio(info)) {
        let Some(kind) = kind(&info) else { continue };
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, infos)) => infos.push(info),
            None => kinds.push((kind, vec![info])),
        }
    }
    let (fours, others): (Vec<_>, Vec<_>) = kinds.into_iter().partition(|(_, infos)| infos.len() == 4);
    if let Some(nic) = nics.iter().find(|nic| !fours.iter().any(|(kind, _)| kind == nic)) {
        let bound = others.iter().find(|(kind, _)| kind == nic).map_or(0, |(_, infos)| infos.len());
        return Err(not_four(nic, bound));
    }
    if nics.is_empty() {
        for (kind, infos) in &others {
            say(&format!("vireo-vfio-bench: left out: {}", not_four(kind, infos.len())));
        }
    }
    let wirings: Vec<Wiring> = fours
        .into_iter()
        .filter(|(kind, _)| nics.is_empty() || nics.iter().any(|nic| nic == kind))
        .map(|(_, infos)| Wiring::new(infos))
        .collect::<Result<_>>()?;
    if wirings.is_empty() {
        return Err(Error::new(
            ErrorKind::Unavailable,
            "cannot measure",
            "a comparison needs four NICs of one kind on vfio-pci, connected in pairs",
        )
        .with_hint(
            "give them with --ports SENDER,FORWARDER_IN,FORWARDER_OUT,RECEIVER; or run: scripts/lab compare",
        ));
    }
    Ok(wirings)
}

/// Returns why `kind`, with `bound` NICs on vfio-pci, is not measured.
fn not_four(kind: &str, bound: usize) -> Error {
    let why = format!("{bound} on vfio-pci, but a comparison needs 4");
    Error::new(ErrorKind::Usage, format!("cannot measure {kind}"), why).with_hint(if bound < 4 {
        "run: vireo-devbind --status"
    } else {
        "choose four: run --ports A,B,C,D; or restore the others: vireo-devbind --restore ADDRESS"
    })
}

/// Returns the usual name of the NIC: QEMU's name, which is also that of the kernel's driver.
pub(crate) fn kind(info: &PciInfo) -> Option<&'static str> {
    match (driver_of(info.id)?, info.id.device) {
        ("e1000", 0x10d3) => Some("e1000e"),
        (driver, _) => Some(driver),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use clap::{Args as _, FromArgMatches as _};
    use std::fs;
    use std::os::unix::fs::symlink;

    pub(in crate::run) const E1000: &str = "100e";
    const E1000E: &str = "10d3";

    /// Returns a bus with an Intel NIC on vfio-pci for each of `devices`.
    pub(in crate::run) fn bus(devices: &[&str]) -> (tempfile::TempDir, Bus) {
        let dir = tempfile::tempdir().unwrap();
        for (slot, device) in devices.iter().enumerate() {
            let path = dir.path().join(format!("devices/0000:00:{slot:02x}.0"));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("vendor"), "0x8086\n").unwrap();
            fs::write(path.join("device"), format!("0x{device}\n")).unwrap();
            symlink("../../drivers/vfio-pci", path.join("driver")).unwrap();
        }
        let bus = Bus::new(dir.path());
        (dir, bus)
    }

    #[test]
    fn a_kind_that_was_named_has_four_nics_or_is_refused() {
        for (bound, hint) in [(0, "vireo-devbind --status"), (3, "vireo-devbind --status"), (5, "--ports")] {
            let (_dir, bus) = bus(&[vec![E1000; 4], vec![E1000E; bound]].concat());
            let nics = ["e1000".to_owned(), "e1000e".to_owned()];
            let error = wirings(&nics, &bus, |_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            let text = error.to_string();
            assert!(text.starts_with(&format!("cannot measure e1000e: {bound} on vfio-pci")), "{text}");
            assert!(text.contains(hint), "{text}");
            let chosen = wirings(&nics[..1], &bus, |_| ()).unwrap();
            assert_eq!(chosen.iter().map(|wiring| wiring.nic).collect::<Vec<_>>(), ["e1000"]);
        }
    }

    #[test]
    fn references_are_left_out_where_they_cannot_forward_and_refused_without_a_generator() {
        let command = RunArgs::augment_args(clap::Command::new("run").no_binary_name(true));
        let words = ["--json", "x", "--references", "bridge,testpmd", "--testpmd", "sh"];
        let args = RunArgs::from_arg_matches(&command.get_matches_from(words)).unwrap();
        assert_eq!(args.plan().references, ["bridge", "testpmd"]);
        let (_dir, bus) = bus(&[[E1000; 4], [E1000E; 4]].concat());
        let wired: Vec<Setup> = wirings(&[], &bus, |_| ()).unwrap().into_iter().map(Setup::Wired).collect();
        let mut said = Vec::new();
        let found = references(&args, &wired, |line| said.push(line.to_owned())).unwrap();
        let expected = [(0, Reference::Bridge), (1, Reference::Bridge), (1, Reference::Testpmd)];
        assert_eq!(found, expected);
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("vireo-vfio-bench: testpmd is left out on e1000: "), "{said:?}");
        let external = [Setup::new(bus.scan().unwrap()[..2].to_vec()).unwrap()];
        let error = references(&args, &external, |_| ()).unwrap_err();
        assert!(error.to_string().contains("cannot measure bridge: references need four NICs"), "{error}");
    }

    #[test]
    fn a_kind_that_is_left_out_is_said_unless_others_were_named() {
        let (_dir, bus) = bus(&[vec![E1000; 4], vec![E1000E; 5]].concat());
        let said = |nics: &[String]| {
            let mut said = Vec::new();
            assert_eq!(wirings(nics, &bus, |line| said.push(line.to_owned())).unwrap().len(), 1);
            said.join("\n")
        };
        let text = said(&[]);
        assert!(
            text.starts_with("vireo-vfio-bench: left out: cannot measure e1000e: 5 on vfio-pci"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
        assert_eq!(said(&["e1000".to_owned()]), "");
    }
}
