#!/bin/bash
# A Slurm cluster of two nodes (n1, n2) on this machine, for tests: `cluster.sh start FOLDER`, `cluster.sh stop FOLDER`.
# Needs root and Debian's packages slurmctld slurmd slurm-client munge; with slurmdbd and mariadb-server-core there is also accounting
# (sacct). ACCOUNTING=0 leaves that out. No systemd and no control groups. Daemons listen on 127.0.0.1 only and log to FOLDER.
# Then `. FOLDER/env.sh`. A node has four CPUs, whatever the machine has. Partitions: main, and high, which preempts main.
set -euo pipefail
command=$1 folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
hosts="# two nodes of a test cluster"

wait_for() { # SECONDS COMMAND...: until it succeeds
    local end=$((SECONDS + $1)); shift
    until "$@" > /dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { echo "waited in vain for: $*; see $folder" >&2; return 1; }
        sleep 0.1
    done
}

daemon() { # NAME COMMAND...: in the background, in a session of its own
    setsid "${@:2}" < /dev/null > "$folder/$1.log" 2>&1 &
    echo "$!" > "$folder/$1.pid"
}

stop() {
    timeout 10 scancel --user=root 2> /dev/null || true
    wait_for 15 sh -c '[ -z "$(timeout 3 squeue --noheader)" ]' 2> /dev/null || true
    for name in slurmd-n1 slurmd-n2 slurmctld slurmdbd mariadbd munged; do
        [ -e "$folder/$name.pid" ] || continue
        local pid; pid=$(cat "$folder/$name.pid")
        kill "$pid" 2> /dev/null || continue
        wait_for 10 sh -c "! kill -0 $pid" || kill -9 "$pid"
    done
    rm -rf "$folder"/*.pid "$folder"/database
    cp /etc/hosts "$folder/hosts" && grep -v "$hosts" "$folder/hosts" > /etc/hosts || true
}

start() {
    local host; host=$(hostname -s)
    mkdir -p "$folder"/state && chmod 755 "$folder"
    (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
    # The node names are addresses for MASTER_ADDR.
    grep -q "$hosts" /etc/hosts || echo "127.0.0.1 n1 n2 $hosts" >> /etc/hosts
    daemon munged munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.own" --log-file="$folder/munged.out" --seed-file="$folder/munged.seed"
    wait_for 10 munge --no-input --socket="$folder/munge.socket"
    local accounting="AccountingStorageType=accounting_storage/none"
    if [ "${ACCOUNTING:-1}" = 1 ] && command -v slurmdbd mariadbd > /dev/null; then
        database
        accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=16919
AccountingStoragePass=$folder/munge.socket
JobAcctGatherType=jobacct_gather/linux"
    fi
    cat > "$SLURM_CONF" <<END
ClusterName=test
# Job ids that no earlier cluster has used.
FirstJobId=$(($(date +%s) % 1000000 + 1))
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16917
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.own
SlurmdPidFile=$folder/slurmd-%n.own
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired: 2 minutes by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
# A node may claim more CPUs than the machine has.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Preempted jobs get their --signal, not only SIGTERM.
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=15
KillWait=${KILLWAIT:-10}
MinJobAge=3600
MaxArraySize=50
$accounting
$(for n in 1 2; do
    echo "NodeName=n$n NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17100 + n)) CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=16000"
done)
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=1-0 DefaultTime=5 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n[1-2] MaxTime=1-0 DefaultTime=5 PriorityTier=10 PreemptMode=OFF
END
    echo "export SLURM_CONF=$SLURM_CONF GLOO_SOCKET_IFNAME=lo" > "$folder/env.sh"
    if [ -e "$folder/slurmdbd.conf" ]; then
        MYSQL_UNIX_PORT=$folder/database/socket daemon slurmdbd slurmdbd -D
        wait_for 15 sacctmgr --noheader list cluster
        sacctmgr --immediate add cluster test > /dev/null 2>&1 || true
    fi
    daemon slurmctld slurmctld -D -i
    for n in n1 n2; do mkdir -p "$folder/spool-$n"; daemon "slurmd-$n" slurmd -D -N "$n"; done
    wait_for 30 sh -c '[ "$(timeout 3 sinfo --noheader --partition=main --states=idle --format=%D)" = 2 ]'
}

database() { # slurmdbd's, with its tables made by hand: the installer is in a larger package
    mkdir -p -m 700 "$folder/database"
    local options="--no-defaults --user=root --datadir=$folder/database/data --innodb-buffer-pool-size=64M --innodb-log-file-size=16M"
    mkdir "$folder/database/data"
    # One statement a line.
    { printf '%s\n' 'create database mysql;' 'use mysql;' 'set @auth_root_socket=NULL;'
      cat /usr/share/mysql/mysql_{system_tables,performance_tables,system_tables_data}.sql
    } | mariadbd $options --bootstrap > "$folder/bootstrap.log" 2>&1
    daemon mariadbd mariadbd $options --socket="$folder/database/socket" --skip-networking --skip-grant-tables --innodb-lock-wait-timeout=900
    wait_for 15 test -S "$folder/database/socket"
    (umask 077 && cat > "$folder/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16919
SlurmUser=root
PidFile=$folder/slurmdbd.own
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
CommitDelay=1
CommunicationParameters=NoInAddrAny
END
    )
}

"$command"
