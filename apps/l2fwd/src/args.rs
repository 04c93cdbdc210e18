//! Arguments after `--`: those of DPDK's l2fwd, some of testpmd and l3fwd, and Vireo's own.

use clap::Parser;
use vireo_drivers::port::{FCS, Offloads, PortConfig};
use vireo_eal::args::port_mask;
use vireo_eal::dma::{MAX_BUFFERS, MAX_FRAME};

use crate::report::Style;

/// Maximum number of RX queues that one lcore polls (`MAX_RX_QUEUE_PER_LCORE` of DPDK's l2fwd, less one).
pub const MOST_QUEUES_PER_LCORE: u32 = 15;
/// Maximum number of queue pairs of a port: one for each possible lcore (`RTE_MAX_LCORE` of DPDK).
const MOST_QUEUES: u16 = 128;
/// Maximum number of processes that share the ports.
const MOST_PROCESSES: u16 = 16;
/// Upper bound of the time between two tables, in seconds: a day.
const LONGEST_PERIOD: f64 = 86_400.0;

/// Range of `--max-pkt-len`. Every port supports the minimum.
const SHORTEST_LIMIT: u16 = 1518;
const LONGEST_LIMIT: u16 = (MAX_FRAME + FCS) as u16;

/// Parsed arguments of l2fwd.
#[derive(Clone, Debug, PartialEq, Parser)]
#[command(
    name = "vireo-l2fwd",
    override_usage = "vireo-l2fwd [EAL ARGUMENTS] -- -p PORTMASK [-P] [-q NQ] [-T PERIOD]",
    about = None::<&str>,
    disable_help_flag = true
)]
pub struct Args {
    /// Ports to use, hexadecimal: bit N is port N
    #[arg(short = 'p', value_name = "PORTMASK", value_parser = port_mask)]
    pub mask: u64,
    /// Receive every frame, not only those for the port's address
    #[arg(short = 'P')]
    pub promiscuous: bool,
    /// RX queues per lcore, 1 to 15
    #[arg(short = 'q', value_name = "NQ", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_QUEUES_PER_LCORE)))]
    pub queues_per_lcore: u32,
    /// Queue pairs per port, 1 to 128
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST_QUEUES)))]
    pub queues: u16,
    /// Number of processes that share the queues of the ports (as in symmetric_mp), 1 to 16. Start the others with
    /// --proc-type secondary and the same arguments
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST_PROCESSES)))]
    pub num_procs: u16,
    /// Number of this process, from 0: it polls its part of the queues. The primary also polls the parts of processes that
    /// do not run
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub proc_id: u16,
    /// Seconds between two tables, such as 0.5; 0 for none
    #[arg(short = 'T', value_name = "PERIOD", default_value = "10", value_parser = period)]
    pub period: f64,
    /// Rewrite the addresses of every packet (the default)
    #[arg(long, overrides_with = "no_mac_updating")]
    mac_updating: bool,
    /// Leave the addresses of packets unchanged
    #[arg(long)]
    pub no_mac_updating: bool,
    /// Pairs of ports that forward to each other, such as "(0,3)(1,2)"; by default, neighboring ports
    #[arg(long, value_name = "PAIRS", value_parser = port_map)]
    pub portmap: Option<PortMap>,
    /// Total number of packet buffers, up to 2097151 (as in testpmd); by default, enough to fill rings,
    /// bursts and caches
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_BUFFERS)))]
    pub total_num_mbufs: Option<u32>,
    /// Longest frame in bytes with its frame check sequence (as in l3fwd), 1518 to 9728. Above 1522, every
    /// port must support long frames; a vhost port drops them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(i64::from(SHORTEST_LIMIT)..=i64::from(LONGEST_LIMIT)))]
    pub max_pkt_len: Option<u16>,
    /// Leave TCP and UDP checksums to devices that can compute and verify them. Frames with a partial
    /// checksum, such as a host sends to its guest, are then received unchanged; l2fwd completes the checksum
    /// if the sending device cannot
    #[arg(long)]
    pub checksum_offload: bool,
    /// Let packets pass through the pool even where an RX queue could share its buffers with the TX queue that
    /// sends its packets, and where a long frame could be copied from one vhost port to another
    #[arg(long)]
    pub no_tied_lanes: bool,
    /// Make lanes stop sharing buffers every so many seconds, and start again, in the middle of their traffic (to
    /// test that no packet is lost)
    #[arg(long, value_name = "SECONDS", conflicts_with = "no_tied_lanes", value_parser = clap::value_parser!(u16).range(1..))]
    pub untie_period: Option<u16>,
    /// Let an lcore sleep after so many polls of each of its queues without a packet (300 if N is left out), until a
    /// NIC interrupts. An idle lcore then takes no CPU time, and the first packet waits for it to wake up
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "300", value_parser = clap::value_parser!(u32).range(1..))]
    pub rx_interrupt: Option<u32>,
    /// Measure the polls that move packets, and print ticks per packet at the end (as in testpmd)
    #[arg(long)]
    pub record_core_cycles: bool,
    /// DPDK's text and table, lines with rates, or one JSON object per line; default: table on a terminal,
    /// otherwise lines
    #[arg(long, value_name = "FORM", conflicts_with = "json")]
    output: Option<Style>,
    /// Same as --output json
    #[arg(long)]
    json: bool,
}

/// Pairs of port numbers.
pub type Pairs = Vec<(usize, usize)>;

/// The value of `--portmap`.
#[derive(Clone, Debug, PartialEq)]
pub struct PortMap(pub Pairs);

impl Args {
    /// Returns the configuration of each port.
    pub fn port(&self) -> PortConfig {
        let offloads = if self.checksum_offload { Offloads::all() } else { Offloads::empty() };
        let port = PortConfig::default().with_pairs(self.queues).with_offloads(offloads);
        let port = port.with_rx_interrupts(self.rx_interrupt.is_some()).with_link_interrupt(true);
        self.max_pkt_len.map_or(port, |len| port.with_max_frame(usize::from(len) - FCS))
    }

    /// Returns the form of the output; by default, the form that suits standard output.
    pub fn style(&self) -> Style {
        if self.json { Style::Json } else { self.output.unwrap_or_else(Style::of_stdout) }
    }
}

fn period(text: &str) -> std::result::Result<f64, String> {
    text.parse()
        .ok()
        .filter(|period| (0.0..LONGEST_PERIOD).contains(period))
        .ok_or_else(|| "it is not a number of seconds from 0 to 86399".into())
}

fn port_map(text: &str) -> std::result::Result<PortMap, String> {
    let wrong = || format!("\"{text}\" is not of the form (0,1)(2,3)");
    let inner = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).ok_or_else(wrong)?;
    inner
        .replace("),(", ")(")
        .split(")(")
        .map(|pair| {
            let (a, b) = pair.split_once(',')?;
            Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
        })
        .collect::<Option<Pairs>>()
        .map(PortMap)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vireo_eal::args::parse_app;
    use vireo_eal::{ErrorKind, Result};

    fn read(line: &str) -> Result<Args> {
        parse_app(["l2fwd"].into_iter().chain(line.split_whitespace()).map(Into::into).collect())
    }

    #[test]
    fn dpdk_arguments() {
        let args = read("-p 0x3 -q 2 -T 0.5 -P --no-mac-updating --portmap (0,1)").unwrap();
        assert_eq!(args.mask, 3);
        assert_eq!((args.queues_per_lcore, args.period), (2, 0.5));
        assert!(args.promiscuous && args.no_mac_updating);
        assert_eq!(args.portmap, Some(PortMap(vec![(0, 1)])));
        assert_eq!(args.total_num_mbufs, None);
        assert!(!read("-p f --no-mac-updating --mac-updating").unwrap().no_mac_updating);
        let four = Some(PortMap(vec![(0, 1), (2, 3)]));
        assert_eq!(read("-p f --portmap (0,1),(2,3)").unwrap().portmap, four);
        assert_eq!(read("-p f --portmap=(0,1)(2,3)").unwrap().portmap, four);
        assert_eq!(
            read("-p f --queues 2").unwrap().port(),
            PortConfig::default().with_pairs(2).with_link_interrupt(true)
        );
        let long = read("-p f --max-pkt-len 9728").unwrap().port();
        assert_eq!((long.max_frame, long.is_scattered()), (MAX_FRAME, true));
        assert!(!read("-p f --max-pkt-len 1522").unwrap().port().is_scattered());
        assert_eq!(read("-p f").unwrap().port().offloads, Offloads::empty());
        assert_eq!(read("-p f --checksum-offload").unwrap().port().offloads, Offloads::all());
        assert_eq!(read("-p f --total-num-mbufs 600").unwrap().total_num_mbufs, Some(600));
    }

    #[test]
    fn forms_of_output() {
        let style = |line: &str| read(line).unwrap().style();
        assert_eq!(style("-p 1"), Style::of_stdout());
        assert_eq!(style("-p 1 --json"), Style::Json);
        for (name, form) in [("table", Style::Table), ("lines", Style::Lines), ("json", Style::Json)] {
            assert_eq!(style(&format!("-p 1 --output {name}")), form);
        }
        for line in ["-p 1 --json --output lines", "-p 1 --output xml", "-p 1 --output", "-p 0x0x1"] {
            assert_eq!(read(line).unwrap_err().kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn what_is_wrong_is_said_on_one_line() {
        for line in [
            "",
            "-p xyz",
            "-p 3 -q 16",
            "-p 3 -T 86400",
            "-p 3 --portmap 0,1",
            "-p 3 --nope",
            "-p 3 --max-pkt-len 1517",
            "-p 3 --max-pkt-len 9729",
        ] {
            let error = read(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        assert!(read("").unwrap_err().to_string().contains("-p"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = port_map(&text);
            let _ = port_mask(&text);
            let _ = period(&text);
        }
    }
}
