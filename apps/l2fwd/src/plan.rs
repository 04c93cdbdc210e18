//! Turns the arguments into routes: which port forwards to which, and on which lcore.

use vireo_eal::{Error, ErrorKind, Result};
use vireo_frame::{Processes, Route, assign_lcores, neighbors, no_ports};

use crate::args::{Args, MOST_QUEUES_PER_LCORE, Pairs, PortMap};

/// Distributes the queues of the ports that `args` selects over `processes`, and those of this process over `lcores` (IDs,
/// ascending). There are `ports` ports.
///
/// # Errors
/// `Unavailable` when there are no ports, `Usage` when the port mask, the port pairs, the processes or the lcores do not
/// fit them.
pub fn plan(args: &Args, ports: usize, lcores: &[u32], processes: Processes) -> Result<Vec<Route>> {
    let ways = destinations(&enabled(args.mask, ports)?, args.portmap.as_ref())?;
    let most = Some(args.queues_per_lcore as usize);
    assign_lcores(&ways, args.queues, lcores, most, processes).map_err(|error| {
        if error.hint().is_some() {
            return error;
        }
        let count = processes.part(ways.len() * usize::from(args.queues));
        let most = MOST_QUEUES_PER_LCORE as usize;
        error.with_hint(match count.div_ceil(lcores.len().max(1)) {
            each if each <= most => format!("use -q {each}, or more lcores with -l"),
            _ => format!("use -q {most} and {} lcores with -l", count.div_ceil(most)),
        })
    })
}

/// Returns the numbers of the ports in `mask`.
fn enabled(mask: u64, ports: usize) -> Result<Vec<usize>> {
    let what = format!("cannot use port mask {mask:#x}");
    let last = ports.checked_sub(1).ok_or_else(|| no_ports(&what))?;
    let enabled: Vec<usize> = (0..64).filter(|port| mask >> port & 1 == 1).collect();
    let why = match enabled.iter().find(|port| **port > last) {
        Some(port) => format!("there is no port {port}"),
        None if enabled.is_empty() => "it selects no port".into(),
        None => return Ok(enabled),
    };
    Err(Error::new(ErrorKind::Usage, what, why).with_hint(format!(
        "ports are 0 to {last}; use -p {:x} for all of them",
        u64::MAX >> (63 - last.min(63))
    )))
}

/// Returns pairs of a port and the port that it forwards to, for each of `ports` (port numbers, ascending).
///
/// # Errors
/// `Usage` when `portmap` names a port that is not in `ports`, or names a port twice.
fn destinations(ports: &[usize], portmap: Option<&PortMap>) -> Result<Pairs> {
    let Some(PortMap(pairs)) = portmap else { return Ok(neighbors(ports.iter().copied())) };
    let mut all = Pairs::new();
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
    use vireo_eal::args::parse_app;

    use super::*;

    #[test]
    fn a_map_has_each_port_once() {
        let to =
            |ports: &[usize], pairs: &[(usize, usize)]| destinations(ports, Some(&PortMap(pairs.into())));
        assert_eq!(to(&[0, 1, 2, 3], &[(0, 3)]).unwrap(), [(0, 3), (3, 0)]);
        assert_eq!(destinations(&[0, 2, 5], None).unwrap(), [(0, 2), (2, 0), (5, 5)]);
        assert!(to(&[0, 1], &[(0, 2)]).is_err());
        assert!(to(&[0, 1, 2], &[(0, 1), (1, 2)]).is_err());
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let text = |line: &str, ports| {
            let words = line.split(' ').map(Into::into).collect();
            plan(&parse_app(words).unwrap(), ports, &[0], Processes::default()).unwrap_err().to_string()
        };
        assert_eq!(
            text("l2fwd -p 3", 2),
            "cannot poll 2 RX queues: too few lcores (lcores: 1, queues per lcore: 1); use -q 2, or more lcores with -l"
        );
        assert!(text("l2fwd -p 3 --queues 8", 2).ends_with("use -q 15 and 2 lcores with -l"));
        assert!(
            text("l2fwd -p 6 -q 2", 2)
                .contains("there is no port 2; ports are 0 to 1; use -p 3 for all of them")
        );
        assert!(
            text("l2fwd -p 0 -q 2", 2)
                .contains("it selects no port; ports are 0 to 1; use -p 3 for all of them")
        );
        assert!(text("l2fwd -p 1", 0).contains("there are no ports"));
    }
}
