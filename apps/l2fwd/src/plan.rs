//! Which lcore polls which port, and where its packets go.

use vireo_eal::{Error, ErrorKind, Result};

use crate::args::{Args, Pairs};

/// One direction of forwarding, and the lcore that does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Id of the lcore.
    pub lcore: u32,
    /// Port that it polls.
    pub from: usize,
    /// Port that it sends on.
    pub to: usize,
    /// Which pair of queues of both ports.
    pub pair: usize,
}

/// Shares the queues of the ports of `args` out to `lcores` (ids, ascending), of `ports` ports that there are: first
/// the first queue of each port, then the second.
///
/// # Errors
/// `Unavailable` when there are no ports, `Usage` when mask, pairs or lcores do not fit them.
pub fn plan(args: &Args, ports: usize, lcores: &[u32]) -> Result<Vec<Planned>> {
    let ways = destinations(&enabled(args.mask, ports)?, args.portmap.as_ref())?;
    let count = ways.len() * usize::from(args.queues);
    if lcores.len() * args.queues_per_lcore < count {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("cannot poll {count} RX queues"),
            format!("{} lcores with {} queues each are too few", lcores.len(), args.queues_per_lcore),
        )
        .with_hint(format!("give -q {}, or more lcores with -l", count.div_ceil(lcores.len().max(1)))));
    }
    let each = (0..args.queues.into()).flat_map(|pair| ways.iter().map(move |way| (pair, *way)));
    let lcores = lcores.iter().flat_map(|lcore| std::iter::repeat_n(*lcore, args.queues_per_lcore));
    Ok(each.zip(lcores).map(|((pair, (from, to)), lcore)| Planned { lcore, from, to, pair }).collect())
}

/// Numbers of the ports in `mask`.
fn enabled(mask: u64, ports: usize) -> Result<Vec<usize>> {
    let what = format!("cannot use port mask {mask:#x}");
    let last = ports.checked_sub(1).ok_or_else(|| {
        Error::new(ErrorKind::Unavailable, what.clone(), "there are no ports")
            .with_hint("bind NICs to VFIO: vireo-devbind --status, vireo-devbind --bind vfio-pci ADDRESS")
    })?;
    let enabled: Vec<usize> = (0..64).filter(|port| mask >> port & 1 == 1).collect();
    let why = match enabled.iter().find(|port| **port > last) {
        Some(port) => format!("there is no port {port}"),
        None if enabled.is_empty() => "it selects no port".into(),
        None => return Ok(enabled),
    };
    Err(Error::new(ErrorKind::Usage, what, why).with_hint(format!(
        "ports are 0 to {last}; for all of them give -p {:x}",
        u64::MAX >> (63 - last.min(63))
    )))
}

/// Which port each of `ports` (port numbers, ascending) forwards to.
///
/// # Errors
/// `Usage` when a pair of `portmap` names a port that is not there, or one twice.
fn destinations(ports: &[usize], portmap: Option<&Pairs>) -> Result<Vec<(usize, usize)>> {
    let Some(pairs) = portmap else {
        return Ok(ports
            .chunks(2)
            .flat_map(|pair| match *pair {
                [a, b] => vec![(a, b), (b, a)],
                _ => pair.iter().map(|a| (*a, *a)).collect(),
            })
            .collect());
    };
    let mut all: Vec<(usize, usize)> = Vec::new();
    for (a, b) in pairs {
        for port in [a, b] {
            let why = if !ports.contains(port) {
                "is not in the port mask"
            } else if all.iter().any(|(from, _)| from == port) {
                "is in two pairs"
            } else {
                continue;
            };
            return Err(Error::new(ErrorKind::Usage, "cannot use --portmap", format!("port {port} {why}")));
        }
        all.push((*a, *b));
        if a != b {
            all.push((*b, *a));
        }
    }
    all.sort_unstable();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(mask: u64, queues_per_lcore: usize) -> Args {
        Args {
            mask,
            promiscuous: false,
            queues_per_lcore,
            queues: 1,
            period: None,
            mac_updating: true,
            portmap: None,
            buffers: None,
            record_core_cycles: false,
            output: None,
        }
    }

    #[test]
    fn neighbours_are_paired_and_the_odd_one_echoes() {
        assert_eq!(destinations(&[0, 2, 5], None).unwrap(), [(0, 2), (2, 0), (5, 5)]);
        assert_eq!(destinations(&[0, 1, 2, 3], Some(&vec![(0, 3)])).unwrap(), [(0, 3), (3, 0)]);
        assert!(destinations(&[0, 1], Some(&vec![(0, 2)])).is_err());
        assert!(destinations(&[0, 1, 2], Some(&vec![(0, 1), (1, 2)])).is_err());
    }

    #[test]
    fn lcores_take_their_ports_in_turn() {
        let lanes = plan(&args(0xf, 2), 4, &[1, 3]).unwrap();
        let lanes: Vec<_> = lanes.iter().map(|lane| (lane.lcore, lane.from, lane.to)).collect();
        assert_eq!(lanes, [(1, 0, 1), (1, 1, 0), (3, 2, 3), (3, 3, 2)]);
    }

    #[test]
    fn an_lcore_has_the_same_queue_of_both_ports() {
        let args = Args { queues: 2, ..args(0x3, 2) };
        let lanes = plan(&args, 2, &[0, 1]).unwrap();
        let lanes: Vec<_> = lanes.iter().map(|lane| (lane.lcore, lane.from, lane.to, lane.pair)).collect();
        assert_eq!(lanes, [(0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 1, 1), (1, 1, 0, 1)]);
        assert!(plan(&args, 2, &[0]).unwrap_err().to_string().contains("cannot poll 4 RX queues"));
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let text = |mask, queue, ports| plan(&args(mask, queue), ports, &[0]).unwrap_err().to_string();
        assert!(text(0x3, 1, 2).ends_with("give -q 2, or more lcores with -l"));
        assert!(text(0x6, 2, 2).contains("there is no port 2; ports are 0 to 1; for all of them give -p 3"));
        assert!(text(0, 2, 2).contains("it selects no port; ports are 0 to 1; for all of them give -p 3"));
        assert!(text(0x1, 1, 0).contains("there are no ports"));
    }
}
